"""AlpacaEval's annotations of several models as arrays over the same instructions."""
import numpy as np

from data.alpaca_eval import question, shown_first
from stats.winrate import usable


class Prompts:
    """The annotations of M models as arrays (M, N), with the same N instructions in the same order for all.

    The instructions are those of the records `asked`, in this order, then others that a model has. preferences, lengths
    and reference_lengths are NaN where a model has no annotation; `there` says where it has one.
    """

    def __init__(self, models, asked=()):
        keys = {question(record): None for records in [asked, *models.values()] for record in records}
        self.place = {key: n for n, key in enumerate(keys)}
        self.names, shape = list(models), (len(models), len(keys))
        self.preferences, self.lengths, self.reference_lengths = (np.full(shape, np.nan) for _ in range(3))
        self.switched, self.datasets = np.zeros(shape, dtype=bool), np.full(len(keys), "", dtype=object)
        for m, records in enumerate(models.values()):
            rows = [self.place[question(record)] for record in records]
            self.preferences[m, rows] = usable([record["preference"] for record in records])
            self.lengths[m, rows] = [len(record["output_2"]) for record in records]
            self.reference_lengths[m, rows] = [len(record["output_1"]) for record in records]
            self.switched[m, rows] = [shown_first(record) for record in records]
        for record in [record for records in [asked, *models.values()] for record in records]:
            n = self.place[question(record)]
            self.datasets[n] = self.datasets[n] or record.get("dataset") or ""
        self.there = ~np.isnan(self.lengths)
        self.references = [records[0]["generator_1"] for records in models.values()]
        writers = [records[0]["generator_2"] for records in models.values()]
        self.players = self.names if len(set(self.references)) == 1 else writers    # who plays in stats.ranking
