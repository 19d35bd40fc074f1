"""A robot of openpi's users, unchanged: runs in an environment that has the real openpi-client. argv: port, api key or ''; observations in, answers out."""
import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

asked = json.load(sys.stdin)


def policy() -> WebsocketClientPolicy:
    return WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]), api_key=sys.argv[2] or None)


client = policy()
answers = [client.infer({k: np.asarray(v, np.float32) for k, v in one.items()}) for one in asked]
assert all(a["actions"].flags.c_contiguous and "infer_ms" in a["server_timing"] for a in answers)
broker = ActionChunkBroker(policy(), action_horizon=3)
stepped = [broker.infer({k: np.asarray(v, np.float32) for k, v in asked[0].items()}) for _ in range(4)]
try:
    policy().infer({"wrong": np.zeros(2, np.float32)})
    error = ""
except RuntimeError as e:
    error = str(e)
json.dump({"metadata": client.get_server_metadata(), "actions": [a["actions"].tolist() for a in answers], "stepped": [s["actions"].tolist() for s in stepped],
           "error": error, "numpy": np.__version__}, sys.stdout)
