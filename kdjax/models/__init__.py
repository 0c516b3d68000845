"""Students and teachers: layers, the decoder, Hugging Face folders in and out."""
