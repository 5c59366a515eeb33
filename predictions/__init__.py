"""Files of predictions, for predict.py, the page and checkpoints' cards."""
