from typing import Any

from tests.libraries import Ask

REQUESTS = [
    Ask("GET", "/admin/", 200, "Users"),
    Ask("GET", "/admin/user/list?search=an", 200, "/admin/user/details/1"),
    Ask("POST", "/admin/user/create", 400, "required", {"data": {"save": "Save"}}),
    Ask("GET", "/admin/user/details/1", 200, "ann"),
    Ask("GET", "/admin/user/details/9", 404, ""),
    Ask("GET", "/admin/statics/css/main.css", 200, "{"),
    Ask("GET", "/admin/user/export/csv", 200, "name"),
]

#: When a file was made, in its name.
VOLATILE = r"[\d-]{10}_[\d-]{8}"


def make_app() -> Any:
    from sqladmin import Admin, ModelView
    from sqlalchemy import create_engine
    from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
    from sqlalchemy.pool import StaticPool
    from starlette.applications import Starlette

    class Base(DeclarativeBase): ...

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Users(ModelView, model=User):
        column_list = ["id", "name"]
        column_searchable_list = ["name"]

    options = {"check_same_thread": False}
    engine = create_engine("sqlite://", connect_args=options, poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(User(name="ann"))
    app = Starlette()
    Admin(app, engine).add_view(Users)
    return app
