"""Pictures of tensors."""
