"""The demo's backbone: its model, its tokenizer, and how both are trained on drawn pages."""
