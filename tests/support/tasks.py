"""Documents of lm-eval's tasks, few and small, for models of stories."""

import json

SIX = ("piqa", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "lambada_openai")

PIQA = [
    {"goal": "Find a small planet.", "sol1": "Look at the sky at night.", "sol2": "Purple the of.", "label": 0},
    {"goal": "Feed a dog.", "sol1": "It.", "sol2": "Put some food in a bowl for the dog to eat.", "label": 1},
    {"goal": "Open the door.", "sol1": "Turn the handle.", "sol2": "Turn the handle and then pull it.", "label": 1},
    {"goal": "Swim.", "sol1": "Jump into the lake.", "sol2": "Jump into the stone.", "label": 0},
    {"goal": "Make a friend.", "sol1": "Say hello with a smile.", "sol2": "Say nothing, ever.", "label": 0},
]
ARC = [
    {"question": "What shines at night?", "choices": ["the moon", "a shoe", "grass", "milk"], "label": 0},
    {"question": "What do birds use to fly?", "choices": ["their tails", "their wings", "water"], "label": 1},
    {
        "question": "Where do fish live?",
        "choices": ["in the trees", "in the sky", "in the water", "in books"],
        "label": 2,
    },
]
WINOGRANDE = [
    {"sentence": "Lyra thanked Tom because _ had helped.", "option1": "Lyra", "option2": "Tom", "answer": "2"},
    {"sentence": "The cup did not fit in the box as the _ was big.", "option1": "cup", "option2": "box", "answer": "1"},
]
LAMBADA = [
    {"text": "Once upon a time there was a little girl. Everybody loved the little girl"},
    {"text": "He looked up at the night sky. There were so many stars in the sky"},
    {"text": "The old man told the children a story. They sat down to hear the story"},
    {"text": "The robot was alone, and it wanted to have a friend"},
]
HERE = {"piqa": PIQA, "arc_easy": ARC, "winogrande": WINOGRANDE, "lambada_openai": LAMBADA}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
