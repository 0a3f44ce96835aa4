"""What a judge costs: the tokens that a server counts, and the prices of models in prices.json."""
import datetime
import json
import math
import re
from pathlib import Path

from data import InputError
from data.run_folders import json_lines


def tokens(usage):
    """(prompt, completion) tokens of a reply's usage, None where the server does not say."""
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return None if any(type(count) is not int or count < 0 for count in counts) else tuple(counts)


def dollars(usage, price):
    """What a reply cost at `price` ($ per million tokens of prompt and completion); None if that is not known."""
    counted = tokens(usage)
    return sum(n * each for n, each in zip(counted, price)) / 1e6 if counted and price else None


def prices():
    """data/judges/prices.json: {model: $ per million tokens of prompt and completion}, and dates as "shutdown"."""
    listed = json.loads((Path(__file__).parent / "prices.json").read_text(encoding="utf-8"))
    dates = {name: datetime.date.fromisoformat(day) for name, day in listed["shutdown"].items()}
    return {**listed["prices"], "shutdown": dates}


def price_of(said=""):
    """A function from a model's name to its price, ($ per million prompt tokens, completion tokens), None if unknown.

    `said` is --price, "2.5,10" for all models; else a model costs what prices.json says of its name, without the date
    at its end.
    """
    if said:
        given = [float(x) for x in said.split(",") if re.fullmatch(r"\d+(\.\d+)?", x)]
        if len(given) != 2:
            raise InputError(f"--price {said}: $ per million tokens of prompt and of completion, as in 2.5,10")
        return lambda model: tuple(given)
    listed = prices()
    dated = re.compile(r"-(\d{4}-\d\d-\d\d|\d{8}|latest)$")
    found = {name: tuple(price) for name, price in listed.items() if name != "shutdown"}
    return lambda model: found.get(model) or found.get(dated.sub("", model))


def spent(paths, price):
    """What the replies in files of judges took: {model: {replies, prompt, completion, dollars}}, tokens as the server
    counted them, dollars None where one of them is not known. price: model -> its price."""
    found = {}
    for entry in (entry for path in paths for entry in json_lines(path)):
        before = entry.get("before")
        model, usages = str(entry.get("model")), [entry.get("usage"), *(before if isinstance(before, list) else [])]
        row = found.setdefault(model, {"replies": 0, "prompt": 0, "completion": 0, "dollars": 0.})
        row["replies"] += len(usages)
        for usage in usages:
            prompt, completion = tokens(usage) or (0, 0)
            cost = dollars(usage, price(model)) if tokens(usage) != (0, 0) else 0.
            row["prompt"], row["completion"] = row["prompt"] + prompt, row["completion"] + completion
            row["dollars"] = None if None in (cost, row["dollars"]) else row["dollars"] + cost
    return found


def forecast(requests, most, room, price):
    """What these requests would cost, as text.

    About: four characters make a token, and each reply is as long as it may be. At most: all of `most` are sent, with
    what second questions add to them; a byte makes a token, and each reply has `room` if the model thinks.
    """
    prompt, about, brief, bound = 0, 0.0, 0.0, 0.0
    for body in requests:
        tokens_asked = sum(len(message["content"]) for message in body["messages"]) // 4
        prompt += tokens_asked
        about += cost(price(body["model"]), tokens_asked, body["max_tokens"])
    for body in most:
        size = sum(len(message["content"].encode()) for message in body["messages"])
        brief += cost(price(body["model"]), size + 10_000, body["max_tokens"])
        bound += cost(price(body["model"]), size + 10_000, max(room, body["max_tokens"]))
    money = f"about ${about:.2f}, all twice ${brief:.2f}; at most, with the longest thoughts, ${bound:.2f}"
    return f"{prompt:,} tokens of prompt, {money if bound == bound else 'price unknown (--price)'}"


def cost(price, prompt, answer):
    """$ of so many tokens, NaN if the price is unknown."""
    return (prompt * price[0] + answer * price[1]) / 1e6 if price else math.nan
