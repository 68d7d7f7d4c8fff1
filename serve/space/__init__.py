"""`python -m serve space`: a complete Hugging Face Space, which runs without torch and this project."""
