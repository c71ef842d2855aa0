"""Acts on plans: the migrator, its quota, its history and its log."""

from tiermem.migrator.log import Entry as Entry
from tiermem.migrator.migrator import Migrator as Migrator
from tiermem.migrator.quota import Quota as Quota
from tiermem.migrator.replicas import Replicas as Replicas
