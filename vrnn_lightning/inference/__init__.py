"""Forecasts, imputations, scores, encodings, streams and exports of a trained model, in data units."""

from vrnn_lightning.inference.batches import Given
from vrnn_lightning.inference.model import Encoding, Inference
from vrnn_lightning.inference.session import Predictive, Session, Step, upcoming

__all__ = ["Encoding", "Given", "Inference", "Predictive", "Session", "Step", "upcoming"]
