"""Choosing hyper-parameters by the clients' own validation parts: ``fedtl tune``.

``rates`` is the learning-rate range test, ``search`` a search over named keys, ``space`` what may
be searched and ``validation`` who judges it. Nothing here looks at a client's test examples.
"""
