"""The ADM U-Net, its layers, and weights of it that were trained elsewhere."""

from funlora_lab.unet.checkpoint import load_base, read_checkpoint
from funlora_lab.unet.network import UNet, conv_layers, part_of
