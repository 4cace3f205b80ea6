"""What a trained model is for, in data units and without a Trainer."""

from vrnn_lightning.inference.model import Encoding, Given, Inference
from vrnn_lightning.inference.session import Predictive, Session, Step, upcoming

__all__ = ["Encoding", "Given", "Inference", "Predictive", "Session", "Step", "upcoming"]
