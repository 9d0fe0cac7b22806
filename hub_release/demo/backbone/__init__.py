"""The demo's vision-language model, trained from scratch on drawn pages."""
