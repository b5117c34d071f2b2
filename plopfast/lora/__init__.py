"""LoRA: the operation, the module, the placement of adapters, and PEFT's files."""
