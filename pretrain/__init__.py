"""Batches to a backbone: one trainer, one state; objectives are plug-ins."""
