"""FunLoRA: generative class-incremental learning with functional low-rank adapters."""

__version__ = "0.1.0"
