"""What a forward pass reads and moves beside its inputs, noted so that it can be put back."""
