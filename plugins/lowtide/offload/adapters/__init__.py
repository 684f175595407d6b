"""DeepSpeed's private interfaces."""
