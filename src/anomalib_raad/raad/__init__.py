"""RAAD: the model in torch and its fit in Lightning."""
