"""Autocast: evaluates any function again in mixed precision, under a table of rules."""

from mpjax._autocast._autocast import autocast as autocast
from mpjax._autocast._autocast import noted as noted
from mpjax._autocast._regions import full_precision as full_precision
from mpjax._autocast._regions import keep_precision as keep_precision
from mpjax._autocast._rules import Rules as Rules
from mpjax._autocast._rules import default_rules as default_rules
