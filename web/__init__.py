"""The web page of app.py: a model that streams, what is kept of each visitor, and the Gradio page."""
