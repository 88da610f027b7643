"""Models for Hugging Face transformers: each module needs it, and registers its classes on import."""
