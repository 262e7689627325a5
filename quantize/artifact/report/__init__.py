"""The page that shows a person what a run did, and the model card, both made of the manifest."""
