// SPDX-License-Identifier: Apache-2.0
/** `tcmu` for the guides' blocks: the real one, but `serve` serves over the simulated kernel. */
import type {
  BlockStore,
  CommandHandler,
  RingSource,
  ServeHandlerOptions,
  ServeOptions,
} from 'tcmu';
import { type Command, Device } from 'tcmu';
import { SimulatedDevice, simulate } from 'tcmu/sim';

export * from 'tcmu';

export async function serve(store: BlockStore, options: ServeOptions) {
  const simulated = await simulate(store);
  return served(options, simulated.device, () => simulated.close());
}

export async function serveHandler(handler: CommandHandler<Command>, options: ServeHandlerOptions) {
  const kernel = new SimulatedDevice();
  const device = await Device.open(kernel.open(), { handler });
  return served(options, device, async () => {
    await device.close();
    kernel.close();
  });
}

/** The simulated kernel's device, in a process that is asked to end as soon as it would notice. */
export function openUio(): RingSource {
  const kernel = new SimulatedDevice();
  const end = () => {
    if (process.listenerCount('SIGTERM') === 0) return setImmediate(end);
    process.kill(process.pid, 'SIGTERM');
  };
  end();
  return kernel.open();
}

function served(
  options: ServeOptions | ServeHandlerOptions,
  device: Device,
  close: () => Promise<void>,
) {
  const { export: wanted } = options;
  const iscsi = typeof wanted === 'object' && wanted.type === 'iscsi' ? wanted : undefined;
  // A program that serves goes on; one in a test ends when it has nothing more to do.
  const end = setImmediate(() => close());
  const disk = wanted === 'loopback' ? '/dev/sda' : undefined;
  return {
    name: options.name,
    reach: disk ?? '/dev/uio0, exported to nobody',
    device,
    disk,
    uioPath: '/dev/uio0',
    iscsi: iscsi && { url: `iscsi://${iscsi.portals?.[0] ?? '127.0.0.1:3260'}/${iscsi.iqn}/0` },
    recovered: false,
    close: () => {
      clearImmediate(end);
      return close();
    },
  };
}
