"""Training of Captioner's models with Lightning. Uses the library; the library never imports it."""
