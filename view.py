"""The page: fly the camera in the picture's own points, film it, and drive on.

    pip install -e ".[view]" && python view.py        # http://127.0.0.1:8080, the demo with the miniature

`Page` is one browser's view of a `Studio` (studio.py), in viser, whose cameras are OpenCV's too; all pages show the
same one. Words that the page does not know itself are sample.py's: --image, --depth, --weights, --lora, --set and so
on.
"""

import argparse
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import job
import sample
from files.cli import run_program
from geometry.camera import inverse, quaternion, rigid
from geometry.flight import AMOUNTS, pushed
from geometry.surface import transform
from studio import Studio

STEPS = (  # rows of buttons: what each says -> its verb of --move, and which way
    {"forward": ("forward", 1), "back": ("back", 1), "rise": ("up", 1), "sink": ("down", 1)},
    {"left": ("left", 1), "right": ("right", 1), "turn left": ("yaw", -1), "turn right": ("yaw", 1)},
    {"look up": ("pitch", 1), "look down": ("pitch", -1), "roll left": ("roll", -1), "roll right": ("roll", 1)})
UNUSED = ("--poses", "--move", "--warp", "--frames", "--out", "--list", "--continue")  # words of sample.py
IGNORED = ("check", "latents", "resample", "prompt_blend")  # its settings that the page can't follow
LOCAL = ("127.0.0.1", "localhost", "::1")


def large(frame: np.ndarray) -> np.ndarray:
    """A small frame enlarged for the eye."""
    times = max(560 // frame.shape[1], 1)
    return frame.repeat(times, axis=0).repeat(times, axis=1)


class Page:
    """What one browser shows of the studio, and what its buttons do."""

    def __init__(self, client, studio: Studio):
        self.client, self.studio = client, studio
        self.open, self.shown = True, 0  # the frame that is shown; -n is the picture of the n-th world
        self.build()
        self.look()
        studio.changed.append(self.refresh)
        self.refresh()
        threading.Thread(target=self.play, daemon=True).start()

    # ---- what is on it

    def build(self) -> None:
        gui, studio = self.client.gui, self.studio
        gui.configure_theme(control_width="large", show_logo=False, show_share_button=False)
        self.video = gui.add_image(large(studio.picture), format="jpeg", jpeg_quality=90)
        self.status = gui.add_markdown("")
        self.bar = gui.add_progress_bar(0.0)
        self.buttons({"stop": studio.stop})
        tabs = gui.add_tab_group()
        with tabs.add_tab("Film"):
            self.keys = gui.add_dropdown("keyframe", ["0: the picture"])
            self.keys.on_update(lambda event: self.choose_key())
            self.gap = gui.add_number("seconds to it", 2.0, min=0.1, max=60, step=0.1)
            self.buttons({"add keyframe": self.add_key, "move it here": self.move_key})
            self.buttons({"set its seconds": self.time_key, "remove it": self.remove_key})
            self.buttons({"preview": lambda: studio.replace_film(studio.preview),
                          "generate": lambda: studio.replace_film(studio.generate)})
        with tabs.add_tab("Drive"):
            self.follow = gui.add_checkbox("follow me", False)
            self.follow.on_update(lambda event: self.follow.value and self.drive())
            self.size = gui.add_slider("step size", 0.1, 5.0, 0.1, 1.0,
                                       hint="of the buttons below; 1 is a tenth of the median depth, or ten degrees")
            for row in STEPS:
                self.buttons({name: partial(self.push, *step) for name, step in row.items()})
        with gui.add_folder("Picture and words"):
            upload = gui.add_upload_button("another picture", mime_type="image/*")
            upload.on_upload(lambda event: self.attempt(lambda: self.upload(event.target.value)))
            self.words = {"prompt": gui.add_text("prompt", studio.prompt),
                          "seed": gui.add_number("seed", studio.seed, min=0, step=1),
                          "preset": gui.add_dropdown("preset", list(job.PRESETS), initial_value=studio.preset)}
            self.heard = {name: getattr(studio, name) for name in self.words}
            for name, widget in self.words.items():
                widget.on_update(partial(self.say, name))
        with gui.add_folder("Save"):
            self.buttons({f"save {kind}": partial(self.save, kind) for kind in ("mp4", "json", "ply")})

    def buttons(self, row: dict[str, Callable[[], object]]) -> None:
        self.client.gui.add_button_group("", list(row)).on_click(lambda event: self.attempt(row[event.target.value]))

    def attempt(self, work: Callable[[], object]) -> None:
        """What can't be done is said on the page."""
        try:
            work()
        except (ValueError, OSError) as error:
            self.studio.tell(f"**error**: {error}")

    def look(self) -> None:
        """The picture's points, in the units of the path and the axes of its camera, and the viewer where that is."""
        self.world = self.studio.worlds  # first: what changes meanwhile is looked at again
        geometry, unit = self.studio.geometry, self.studio.camera.unit
        axes = transform(inverse(geometry.c2w.cpu()), *geometry.points[geometry.valid].cpu().unbind(-1))
        points = torch.stack(axes, dim=-1).numpy() / unit
        self.fov = 2 * np.arctan(geometry.depth.shape[0] / 2 / geometry.K[1, 1].item())
        scene, camera = self.client.scene, self.client.camera
        scene.add_point_cloud("/points", points, geometry.rgb[geometry.valid].cpu().numpy(), point_size=0.05,
                              precision="float32")
        camera.up_direction = (0.0, -1.0, 0.0)
        camera.position, camera.look_at = (0.0, 0.0, 0.0), (0.0, 0.0, 10.0)
        camera.fov = self.fov

    def refresh(self) -> None:
        studio = self.studio
        self.status.content, self.bar.value = studio.message, 100 * min(studio.progress, 1.0)
        options = [f"{index}: {'the picture' if index == 0 else f'after {seconds:g} s'}"
                   for index, seconds in enumerate([0.0, *studio.seconds])]
        if tuple(options) != tuple(self.keys.options):
            chosen = min(self.key, len(options) - 1)
            self.keys.options = options
            self.keys.value = options[chosen]
        for name, widget in self.words.items():
            heard = self.heard[name]  # before what is said, as `say` writes them the other way round
            if (value := getattr(studio, name)) != heard:  # said on another page, or refused
                self.heard[name] = widget.value = value
        if self.world != studio.worlds:
            self.look()
        if len(studio.keys) > 1:
            places = torch.stack(studio.keys)[:, :3, 3].numpy()
            self.client.scene.add_spline_catmull_rom("/path", places, color=(220, 60, 30), thickness=0.05)
        else:
            self.client.scene.add_spline_catmull_rom("/path", np.zeros((2, 3)), visible=False)

    def play(self) -> None:
        """The film so far, over and over, while the page is open; the frustum stands where a frame was seen from."""
        while self.open:
            frames, path = self.studio.frames, self.studio.path
            if frames:
                self.shown = max(self.shown + 1, 0) % len(frames)
                self.video.image = large(frames[self.shown])
                if self.shown < len(path):
                    self.place_camera(path[self.shown], frames[self.shown])
            elif self.shown != -self.world:
                self.shown, self.video.image = -self.world, large(self.studio.picture)
                self.client.scene.remove_by_name("/camera")
            time.sleep(1 / self.studio.fps)

    def place_camera(self, pose: Tensor, frame: np.ndarray) -> None:
        """The frustum with its frame, unless the viewer stands in it."""
        place = pose[:3, 3].numpy()
        away = np.linalg.norm(self.client.camera.position - place)
        self.client.scene.add_camera_frustum(
            "/camera", self.fov, frame.shape[1] / frame.shape[0], scale=2.0, thickness=1.5, thickness_units="screen",
            image=frame, format="jpeg", position=place, wxyz=quaternion(pose[:3, :3]).numpy(), visible=bool(away > 1))

    def close(self) -> None:
        self.open = False
        self.studio.changed.remove(self.refresh)

    # ---- what its buttons do

    @property
    def pose(self) -> Tensor:
        """Where the viewer is, and looks."""
        camera = self.client.camera
        turn, place = (torch.from_numpy(np.array(each, np.float64))[None] for each in (camera.wxyz, camera.position))
        return rigid(turn, place)[0].float()

    @property
    def key(self) -> int:
        return int(self.keys.value.partition(":")[0])

    def add_key(self) -> None:
        self.studio.keys.append(self.pose)
        self.studio.seconds.append(float(self.gap.value))
        self.studio.tell(f"keyframe {len(self.studio.seconds)} added")
        self.keys.value = self.keys.options[-1]

    def choose_key(self) -> None:
        """Its seconds are shown; the first keyframe has none."""
        if self.key > 0:
            self.gap.value = self.studio.seconds[self.key - 1]

    def change_key(self) -> int:
        if self.key == 0:
            raise ValueError("the first keyframe is the picture's own camera; add another one")
        return self.key

    def move_key(self) -> None:
        index = self.change_key()
        self.studio.keys[index] = self.pose
        self.studio.tell(f"keyframe {index} moved here")

    def time_key(self) -> None:
        index, seconds = self.change_key(), float(self.gap.value)
        self.studio.seconds[index - 1] = seconds
        self.studio.tell(f"keyframe {index} comes after {seconds:g} s")

    def remove_key(self) -> None:
        index = self.change_key()
        del self.studio.keys[index], self.studio.seconds[index - 1]
        self.studio.tell(f"keyframe {index} removed")

    def say(self, name: str, event) -> None:
        """A word of this browser's user, for all pages; not one that another page has said."""
        if event.client is not None:
            value = type(self.heard[name])(event.target.value)
            setattr(self.studio, name, value)
            self.heard[name] = value
            if name == "preset":
                self.studio.submit(lambda: self.studio.prefer(value))
            self.studio.tell()

    def drive(self) -> None:
        """Chunk after chunk to where the viewer looks, while this page is open and asks for it."""
        def end(_) -> None:
            if self.open:
                self.follow.value = False

        drive = partial(self.studio.drive, lambda: self.pose if self.open and self.follow.value else None)
        self.studio.submit(drive, film=True).add_done_callback(end)

    def push(self, verb: str, way: int) -> None:
        """One chunk by a button, from where the film is; the viewer goes along."""
        amount = way * AMOUNTS[verb] * self.size.value

        def go() -> None:
            self.studio.drive(lambda: pushed(self.studio.here, verb, amount), 1)
            place, turn = self.studio.here[:3, 3].numpy(), quaternion(self.studio.here[:3, :3]).numpy()
            if self.open:
                with self.client.atomic():
                    self.client.camera.position, self.client.camera.wxyz = place, turn

        self.studio.submit(go, film=True)

    def upload(self, file) -> None:
        self.studio.receive(file.name, file.content)
        if self.studio.prompt == sample.DEMO["prompt"]:  # not what this picture shows
            self.studio.prompt = ""
            self.studio.tell()

    def save(self, kind: str) -> None:
        self.client.send_file_download(f"film.{kind}", self.studio.saved(kind), save_immediately=True)


def enter(client, studio: Studio, pages: dict[int, Page | None]) -> None:
    """A browser's page, closed again if it has left meanwhile: viser says so in another thread."""
    page = Page(client, studio)
    if pages.setdefault(client.client_id, page) is not page:
        page.close()


def leave(client, pages: dict[int, Page | None]) -> None:
    """A browser's page is closed; one that is still being built finds its place taken."""
    page = pages.setdefault(client.client_id, None)
    pages[client.client_id] = None
    if page is not None:
        page.close()


def admit(client, studio: Studio, token: str | None, pages: dict[int, Page | None]) -> None:
    """A browser comes in; with a `token` it sees nothing before it has given it."""
    if token is None:
        enter(client, studio, pages)
        return
    asked = client.gui.add_text("token", "")
    button = client.gui.add_button("enter")
    answer = client.gui.add_markdown("")
    once = threading.Lock()  # a second click may come before the first one's page is there

    def press(event) -> None:
        if not secrets.compare_digest(asked.value.encode(), token.encode()):
            answer.content = "**error**: this is not the token"
        elif once.acquire(blocking=False):
            for widget in (asked, button, answer):
                widget.remove()
            enter(client, studio, pages)

    button.on_click(press)


def serve(args: argparse.Namespace):
    """The running server, its studio and the pages."""
    try:
        import viser
    except ImportError:
        raise ValueError('the page needs viser: pip install -e ".[view]"') from None
    if args.host not in LOCAL and not args.token:
        raise ValueError(f"--host {args.host}: opens this page to the network; give a --token, which it will ask for")
    try:  # viser would try for ever
        socket.create_server((args.host, 0), family=socket.getaddrinfo(args.host, 0)[0][0]).close()
    except OSError as error:
        raise ValueError(f"--host {args.host}: nothing can listen there ({error})") from None
    studio, pages = Studio(args), {}
    server = viser.ViserServer(host=args.host, port=args.port, label="Warp-as-History", verbose=False)
    server.scene.set_up_direction("-y")
    server.on_client_connect(lambda client: admit(client, studio, args.token, pages))
    server.on_client_disconnect(lambda client: leave(client, pages))
    where = "this machine alone" if args.host in LOCAL else "everybody who reaches this machine, and knows the token"
    host = f"[{args.host}]" if ":" in args.host else args.host  # an address of IPv6
    print(f"http://{host}:{server.get_port()} for {where}; Ctrl-C ends it")
    return server, studio, pages


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("view.py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description="A page in which a camera is flown, filmed and driven.")
    parser.add_argument("--host", default="127.0.0.1", help="any other than this one needs --token")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--token", help="a word that the page asks for")
    mine, rest = parser.parse_known_args(words)
    if not 0 <= mine.port < 2**16:
        parser.error(f"--port {mine.port}: expected a number from 0 to 65535")
    for word in rest:
        if word.partition("=")[0] in UNUSED:
            parser.error(f"{word}: not of the page, which starts without a path and saves with its buttons")
    args = sample.parse(rest)
    for word in args.set:
        if word.partition("=")[0] in IGNORED:
            parser.error(f"--set {word}: not of the page")
    if "|" in args.prompt:
        parser.error(f"--prompt {args.prompt!r}: one for each chunk is not of the page; change it there between chunks")
    if args.image is None and args.video is None:
        if args.depth is not None:
            parser.error("--depth needs the picture that it is of: --image")
        vars(args).update({**sample.DEMO, "prompt": args.prompt or sample.DEMO["prompt"]})
    return argparse.Namespace(**{**vars(args), **vars(mine)})


def run(args: argparse.Namespace) -> None:
    server, studio, _ = serve(args)
    try:
        server.sleep_forever()
    finally:
        studio.stop()
        server.stop()


def main(words: list[str] | None = None) -> int:
    return run_program("view.py", run, parse(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
