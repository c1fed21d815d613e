"""Raw-audio baselines in PyTorch: wav2vec 2.0, HuBERT, DistilHuBERT (H-infinity LSTM paper, table II)."""
