"""The one error of the converters."""


class ConversionError(ValueError):
    """What was given cannot be converted; one line with the bad value and the way out."""


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error that another library raised, without the rest of its explanations."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(" .:") if lines else type(error).__name__
