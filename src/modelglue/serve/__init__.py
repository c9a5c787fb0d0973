"""Floor 6: a model or a mixture behind HTTP, in OpenAI's dialect."""

from modelglue.serve.engine import BusyError, Engine
from modelglue.serve.hosts import Host, MixtureHost, ModelHost, host_of
from modelglue.serve.jobs import Job
from modelglue.serve.limits import Limits

__all__ = ["BusyError", "Engine", "Host", "Job", "Limits", "MixtureHost", "ModelHost", "host_of"]
