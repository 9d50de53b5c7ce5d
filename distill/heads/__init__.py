"""Loss terms that compare a student with a teacher or with labels, one file per method."""

from inspect import isabstract

from distill.heads.ab import AB
from distill.heads.at import AT
from distill.heads.base import Batch, Head, LogitHead, RelationHead, RunInfo, Scope
from distill.heads.cat_kd import CATKD
from distill.heads.cc import CC
from distill.heads.crd import CRD
from distill.heads.crld import CRLD
from distill.heads.cross_entropy import CrossEntropy
from distill.heads.ctkd import CTKD
from distill.heads.dcd import DCD
from distill.heads.dist import DIST
from distill.heads.dkd import DKD
from distill.heads.embedding_regression import EmbeddingRegression
from distill.heads.fitnet import FitNet
from distill.heads.fsp import FSP
from distill.heads.ft import FT
from distill.heads.ickd import ICKD
from distill.heads.irg import IRG
from distill.heads.kd import KD
from distill.heads.ldam import LDAM
from distill.heads.logit_adjustment import LogitAdjustment
from distill.heads.mlkd import MLKD
from distill.heads.nkd import NKD
from distill.heads.nst import NST
from distill.heads.parts.temperature import CurriculumTemperature
from distill.heads.pkt import PKT
from distill.heads.rep_distiller_cc import RepDistillerCC
from distill.heads.review_kd import ReviewKD
from distill.heads.rkd import RKD
from distill.heads.rld import RLD
from distill.heads.rrd import RRD
from distill.heads.sdd import SDD
from distill.heads.serkd import SeRKD
from distill.heads.sp import SP
from distill.heads.srrl import SRRL
from distill.heads.token_regression import TokenRegression
from distill.heads.trg import TRG
from distill.heads.vid import VID
from distill.heads.vrm import VRM
from distill.heads.wkd_f import WKDF
from distill.heads.wkd_l import WKDL

__all__ = [
    "AB",
    "AT",
    "CATKD",
    "CC",
    "CRD",
    "CRLD",
    "CTKD",
    "DCD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "ICKD",
    "IRG",
    "KD",
    "LDAM",
    "MLKD",
    "NKD",
    "NST",
    "PKT",
    "RKD",
    "RLD",
    "RRD",
    "SDD",
    "SP",
    "SRRL",
    "TRG",
    "VID",
    "VRM",
    "WKDF",
    "WKDL",
    "Batch",
    "CrossEntropy",
    "CurriculumTemperature",
    "EmbeddingRegression",
    "FitNet",
    "Head",
    "LogitAdjustment",
    "LogitHead",
    "RelationHead",
    "RepDistillerCC",
    "ReviewKD",
    "RunInfo",
    "Scope",
    "SeRKD",
    "TokenRegression",
    "shipped",
]


def shipped() -> dict[str, type[Head]]:
    """Return the heads of this package that can be configured, by class name."""
    exported = {name: globals()[name] for name in __all__}
    return {
        name: item
        for name, item in exported.items()
        if isinstance(item, type) and issubclass(item, Head) and not isabstract(item)
    }
