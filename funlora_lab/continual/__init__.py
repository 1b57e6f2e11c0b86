"""The class-incremental loop, its classifiers and scores, the certificate of no forgetting, and finished runs."""

from funlora_lab.continual.classifier import predict, synthetic, train_classifier
from funlora_lab.continual.finished import OpenRun, open_folder, open_run
from funlora_lab.continual.loop import learn_base, prepare, provenance, run
from funlora_lab.continual.own_class import LEAST, OwnClass, images_in, learn, shifted
from funlora_lab.continual.scores import accuracy_per_task, average_accuracies, held_out_loss, last_and_incremental
