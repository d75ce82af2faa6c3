"""Publishing: a data set with its card, its Croissant file and a preview, on the Hugging Face hub."""
