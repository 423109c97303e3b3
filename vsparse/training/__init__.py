"""Fine-tuning video diffusion transformers with sparse attention."""
