"""Statistics of preferences, in numpy: win rates and their errors, length control, rankings, agreement of judges."""
