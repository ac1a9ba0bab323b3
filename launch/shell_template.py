"""Shell commands with {name}s in them."""

import re
import shlex

from causalfusion_jax.common.errors import require


def fill(template: str, values: dict[str, str]) -> str:
    """A shell command with {name}s replaced, each quoted for where it stands.

    Raises:
      InputError: {command} is missing, or a name is unknown.
    """
    require("{command}" in template, "--launcher", template, "must hold {command}, which stands for the job")
    filled, quote, i = [], "", 0
    while i < len(template):
        # ${NAME} is the shell's own.
        match = re.compile(r"(?<!\$)\{(\w+)\}").match(template, i)
        if match:
            name = match[1]
            require(name in values, "--launcher", f"{{{name}}}", f"must be one of {', '.join(values)}")
            filled.append(_quoted(values[name], quote))
            i = match.end()
            continue
        char = template[i]
        if char == "\\" and quote != "'":
            filled.append(template[i : i + 2])
            i += 2
            continue
        if char in "'\"" and quote in ("", char):
            quote = "" if quote else char
        filled.append(char)
        i += 1
    return "".join(filled)


def _quoted(value: str, quote: str) -> str:
    """`value` as the shell will read it back inside `quote` (none, ' or ")."""
    if quote == '"':
        return re.sub(r'([\\"$`])', r"\\\1", value)
    if quote == "'":
        return value.replace("'", "'\\''")
    return shlex.quote(value)
