"""What the HTTP servers on this machine share: whom they answer, and how much of a request they read."""
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ADDRESS = re.compile(r"https?://(\[[0-9a-f:]+\]|[\w.-]+)(:\d{1,5})?(/[\w.~%/-]*)?", re.IGNORECASE)


def on_this_machine(url):
    """Whether an address leads to this machine, whoever answers for names: 127.evil.example does not."""
    host = ADDRESS.fullmatch(url)
    return bool(host) and bool(re.fullmatch(r"localhost|\[::1\]|127(\.\d{1,3}){3}", host[1], re.IGNORECASE))


class Unread(Exception):
    """A request whose body is not read to its end. `status` is the HTTP status; the message says why."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers the HTTP requests of one connection; each connection has a thread."""
    protocol_version = "HTTP/1.1"                       # keep the connection for more requests
    disable_nagle_algorithm = True                      # send small replies at once, not after 40 ms
    timeout = 60                                        # seconds without a byte read or written end the connection

    def is_from_elsewhere(self):
        """Whether a page of another site makes the request from a browser on this machine. Its Origin names that site,
        or its Host does, if the site has let its own name point to this machine (DNS rebinding)."""
        named = [f"http://{host}" for host in self.headers.get_all("Host", [])] + self.headers.get_all("Origin", [])
        return not all(map(on_this_machine, named))

    def body(self, most):
        """The body (bytes) of the request. Unread if it has more than `most` bytes, or not as many as the request says.
        The connection is closed then, since what is left of the body is no request.

        Up to four times the limit is read, since most clients read the reply only after they have sent the whole body.
        """
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch(r"\d{1,15}", length, re.ASCII) or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Unread(411, "Content-Length has to give the length of the body")
        try:
            data = self.rfile.read(min(int(length), 4 * most))
        except TimeoutError:
            data = b""
        if len(data) > most or len(data) < int(length):
            self.close_connection = True
            if int(length) > most:
                raise Unread(413, f"the body is longer than {most} bytes")
            raise Unread(400, f"the body does not have the {length} bytes that Content-Length says")
        return data

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """An HTTP server that prints nothing about clients that have closed their connections."""
    request_queue_size = 128                            # connections that may wait to be accepted

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)
