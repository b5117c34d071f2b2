"""In the tools people have: PEFT models in place, and TRL."""
