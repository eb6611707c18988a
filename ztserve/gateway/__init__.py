"""How does the outside world come in?

`Gateway` is an HTTPS edge (TLS 1.3) with an SVID of its own: it verifies the client's,
judges the request by its own policies, records it, and passes it on to a deployment
over mutual TLS, in the client's name. It knows nothing of Ray and holds no token of it.
"""

from ztserve.gateway.gateway import Gateway
from ztserve.gateway.limits import Limits
from ztserve.gateway.routes import Deployment

__all__ = ["Deployment", "Gateway", "Limits"]
