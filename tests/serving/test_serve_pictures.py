"""Pictures in requests to `optimum-cli lfm2 serve`."""

from __future__ import annotations

import pytest
from servers import ask, openai


def test_pictures_come_with_the_request(client):
    content = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"type": "text", "text": "?"}]
    with pytest.raises(openai.BadRequestError, match="None is fetched"):
        ask(client, [{"role": "user", "content": content}])
    content[0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    with pytest.raises(openai.BadRequestError, match="takes no pictures"):
        ask(client, [{"role": "user", "content": content}])
