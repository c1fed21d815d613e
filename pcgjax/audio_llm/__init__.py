"""The PyTorch bridge: Qwen2-Audio with LoRA over the same prepared data. All torch of training is in here."""
