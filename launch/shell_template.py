"""Shell commands with placeholders."""

import re
import shlex

from causalfusion_jax.common.errors import require

# ${NAME} is a variable of the shell, and a backslash takes the next character with it.
_TOKEN = re.compile(r"""(?<!\$)\{(?P<name>\w+)\}|\\.|['"]""", re.DOTALL)
_IN_SINGLE_QUOTES = re.compile(r"(?<!\$)\{(?P<name>\w+)\}|'")


def fill(template: str, values: dict[str, str]) -> str:
    """A shell command with every {name} replaced, quoted as the shell needs it at that point of the command.

    Raises:
      InputError: {command} is missing, or a name is unknown.
    """
    require("{command}" in template, "--launcher", template, "must hold {command}, which stands for the job")
    filled, quote, start = [], "", 0
    while match := (_IN_SINGLE_QUOTES if quote == "'" else _TOKEN).search(template, start):
        filled.append(template[start : match.start()])
        name, token, start = match["name"], match[0], match.end()
        if name is not None:
            require(name in values, "--launcher", token, f"must be one of {', '.join(values)}")
            token = _quoted(values[name], quote)
        elif token == quote:
            quote = ""
        elif not quote and token in "'\"":
            quote = token
        filled.append(token)
    return "".join([*filled, template[start:]])


def _quoted(value: str, quote: str) -> str:
    """`value` as the shell reads it back inside `quote` (none, ' or ")."""
    if quote == '"':
        return re.sub(r'([\\"$`])', r"\\\1", value)
    if quote == "'":
        return value.replace("'", "'\\''")
    return shlex.quote(value)
