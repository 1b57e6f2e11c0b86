"""Images of classes, their division into tasks, and the data sources they come from."""

from funlora_lab.data.images import Dataset, Images, Later, class_order, tasks, to_bytes, to_floats
from funlora_lab.data.pictures import pictures_of, read_picture, read_pictures
from funlora_lab.data.sources import SOURCES, DataSource, check_unchanged, data_root, data_source, load, remembered
