"""Typed configuration: YAML claims in, frozen values out. Imports nothing of keel."""
