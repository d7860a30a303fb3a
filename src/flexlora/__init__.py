"""Federated LoRA fine-tuning at the rank each client can afford."""
