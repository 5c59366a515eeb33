"""Which answers to a question about a picture are right, and what one answer to all of them would score."""

import collections

# kinds of questions that are answered in metres -> relative error up to which an answer is right
TOLERANCES = {
    "distance": 0.25,
    "point_distance": 0.25,
    "nearest_distance": 0.25,
    "farthest_distance": 0.25,
    "camera_height": 0.1,
}


def is_right(kind: str, answer: str, truth: str) -> bool:
    """Metres within the kind's tolerance; anything else to the letter."""
    if kind not in TOLERANCES:
        return answer == truth
    try:
        return abs(float(answer) - float(truth)) <= TOLERANCES[kind] * float(truth)
    except ValueError:
        return False


def best_constant(kind: str, answers: collections.Counter) -> tuple[str, float]:
    """The one of `answers`, each with how often it is the true one, that is right most often, and its share."""
    right = {
        answer: sum(number for truth, number in answers.items() if is_right(kind, answer, truth))
        for answer in sorted(answers)
    }
    best = max(right, key=right.get)
    return best, right[best] / answers.total()
