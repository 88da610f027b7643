"""Models for Hugging Face transformers, and tools for models: a module registers what it adds on import."""
