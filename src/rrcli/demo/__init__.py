"""The embedded default model: its files lie in this folder, and `defaults` says how it is used."""

from rrcli.demo.defaults import MODEL_DIR, TEXT_FILE

__all__ = ["MODEL_DIR", "TEXT_FILE"]
