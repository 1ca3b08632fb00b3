// SPDX-License-Identifier: Apache-2.0
/** All commands of a block device, one file a family. A new family is one more line here. */
import type { CommandSpec } from '../command-spec.js';
import { capacityCommands } from './capacity.js';
import { compareCommands } from './compare.js';
import { copyCommands } from './copy.js';
import { defectCommands } from './defects.js';
import { formatCommands } from './format.js';
import { inquiryCommands } from './inquiry.js';
import { logCommands } from './log.js';
import { longCommands } from './long.js';
import { maintenanceCommands } from './maintenance.js';
import { modeCommands } from './mode.js';
import { provisioningCommands } from './provisioning.js';
import { readCommands } from './read.js';
import { synchronizeCommands } from './synchronize.js';
import { unitCommands } from './unit.js';
import { writeCommands } from './write.js';

export const blockCommands: readonly CommandSpec[] = [
  ...unitCommands,
  ...inquiryCommands,
  ...modeCommands,
  ...capacityCommands,
  ...readCommands,
  ...writeCommands,
  ...compareCommands,
  ...provisioningCommands,
  ...synchronizeCommands,
  ...maintenanceCommands,
  ...formatCommands,
  ...defectCommands,
  ...logCommands,
  ...longCommands,
  ...copyCommands,
];
