"""LoRA: the operation, the module, the placement of adapters, and their files."""
