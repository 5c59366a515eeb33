"""What lmms-eval finds by the entry point: light, as it is read whatever model is asked for."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("depthvlm", chat_class_path="depthvlm_lmms.DepthVLM")
