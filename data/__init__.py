"""Corpora in, batches out. Nothing here knows of models or training."""

from .corpus import Corpus, Vocabulary, find_corpus
from .files import CorpusError

__all__ = ["Corpus", "CorpusError", "Vocabulary", "find_corpus"]
