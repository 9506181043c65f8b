"""TIGER: a transformer that generates the semantic ID of the next item (Rajput et al. 2023)."""

from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.recommender import build, grow, recommender, warm_start
from tiger.models.tiger.train import train

Config = TigerConfig

__all__ = ["Config", "build", "grow", "recommender", "train", "warm_start"]
